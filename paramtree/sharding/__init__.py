"""Rules to shardings, and arrays onto devices."""
