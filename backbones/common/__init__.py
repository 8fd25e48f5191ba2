"""The floor that data, training, restoration, embedding and the commands stand on."""
