"""Models around Draft-and-Revise, a file each; support/models.py says what each must offer."""
