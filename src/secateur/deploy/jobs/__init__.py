"""What a user asks for: export, bench, latency table, export kit, parity, generation."""
