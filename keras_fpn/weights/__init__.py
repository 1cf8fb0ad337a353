"""Reading weights files, and loading them into models."""
