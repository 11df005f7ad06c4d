"""The bundled image set and the script that made it."""
