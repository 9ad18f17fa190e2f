"""What tells how much a weight, a row or a unit matters, and choices made from it. Read only."""
