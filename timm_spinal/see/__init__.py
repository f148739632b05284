"""Use a trained model: predictions for pictures, where it looked, and a page in the browser."""
