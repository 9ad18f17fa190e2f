"""Text: tables of labelled sentences, and Hugging Face encoders that are trained on them."""
