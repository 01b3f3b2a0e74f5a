def draw(d): pass
