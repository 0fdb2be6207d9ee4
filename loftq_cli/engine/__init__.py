"""Carry out a plan in bounded memory: convert, write, journal, resume, share the work."""
