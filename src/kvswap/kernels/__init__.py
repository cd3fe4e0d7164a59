"""Arithmetic on tensors: no files, no models. The plain torch code here defines every kernel."""
