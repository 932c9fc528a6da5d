"""Known errors of the relay, and whether the tests catch them."""
