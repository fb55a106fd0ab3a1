"""What each of the five stages does, top to bottom; `animesion.building` runs them in order."""
