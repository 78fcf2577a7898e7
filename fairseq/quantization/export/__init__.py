"""Files that run without this library, verified before they appear."""
