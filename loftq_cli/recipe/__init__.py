"""Everything a user can ask for, declared once."""
