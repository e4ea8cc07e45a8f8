"""Measured ops and collectives: how they are kept, interpolated, and fitted to a cluster."""
