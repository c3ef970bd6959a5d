"""The made-up world that the built-in model was trained on: people, firms and places, and pages about them."""
