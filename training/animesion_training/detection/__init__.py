"""Train the face detector of `animesion.detectors.anime` on composed scenes and labelled illustrations."""
