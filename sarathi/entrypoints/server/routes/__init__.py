"""Routes that belong to no API: health, metrics."""
