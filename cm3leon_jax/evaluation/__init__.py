"""Measures of finished systems, and the report that shows them."""
