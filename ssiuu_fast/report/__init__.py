"""What a person reads at the end: tables and figures."""
