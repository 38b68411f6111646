"""The Fisher diagonal; `definition` states it in six lines, the other modules compute it faster."""
