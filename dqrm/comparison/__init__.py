"""Runs side by side: what they measured, how they differ, pictures and a report of it."""
