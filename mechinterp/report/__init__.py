"""Figures, files and pages made from results. Knows core only: plans and texts are handed in as text."""
