"""Methods to compare with, and the fine-tuning run they share."""
