"""Finished conversions on the Hub: the copy that is pushed, the push itself, and its errors."""
