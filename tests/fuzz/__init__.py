"""Coverage-guided fuzzing of the relay's leaves under AddressSanitizer: what scripts/fuzz runs."""
