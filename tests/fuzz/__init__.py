"""Coverage-guided fuzzing under AddressSanitizer: what scripts/fuzz runs."""
