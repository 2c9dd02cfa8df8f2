"""The doors to the hosts, one package each. Nothing is imported here."""
