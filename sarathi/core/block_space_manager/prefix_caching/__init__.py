"""Prefix caching: requests begin with the computed tokens of others, and ended requests are retained for them."""
