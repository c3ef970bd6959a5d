"""The small model that ships with the package, its documents and the world they tell about."""
