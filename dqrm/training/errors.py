"""What training raises. Apart, since importing the training itself takes torch."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""
