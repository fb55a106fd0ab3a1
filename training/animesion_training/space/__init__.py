"""The files of a Gradio Space for a trained network, which `animesion demo` writes."""
