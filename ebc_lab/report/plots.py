def draw_study(root): pass
