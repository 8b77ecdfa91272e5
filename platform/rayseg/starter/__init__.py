"""A first recipe for a folder that nobody has described: how its files pair, which classes there are, who is who."""
