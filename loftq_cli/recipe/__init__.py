"""The recipe of a conversion: every setting, declared once."""
