"""(weight, statistics, settings) -> integers."""
