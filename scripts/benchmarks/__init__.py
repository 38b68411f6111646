"""Time, memory and accuracy of the Fisher and of the penalty."""
