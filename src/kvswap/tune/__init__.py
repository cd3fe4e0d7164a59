"""Offline: measure, fit and choose. Imports nothing: to measure a device takes no torch."""
