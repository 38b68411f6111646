"""The Fisher diagonal; `definition` says in six lines what all else here computes faster."""
