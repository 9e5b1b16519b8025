"""A trained model at work, away from where it was trained."""
