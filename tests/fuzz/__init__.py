"""Files that are broken at random: see __main__.py."""
