"""Where a run is watched while it goes on."""
