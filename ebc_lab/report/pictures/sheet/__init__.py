"""The page that a picture is drawn on, wide or for a phone: its words, its axes, where everything stands."""
