"""From a trained detector to its answers: `detect`, folding, SavedModel export."""
