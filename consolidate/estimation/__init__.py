"""The Fisher diagonal of a module, estimated from batches of examples."""
