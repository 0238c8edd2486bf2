"""A card of a saved model: what its accuracy on one split hides, beside full training."""
