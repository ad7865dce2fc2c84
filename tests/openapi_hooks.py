"For schemathesis, which knows of a picture only that it is binary: some to choose from."

import schemathesis
from hypothesis import strategies
from serving import encoded, neptune

from celestial_ml.planets.renderer import render

PICTURES = strategies.sampled_from([neptune("JPEG"), neptune("PNG"), neptune("WEBP"), encoded(render("Mars"))])
for kind in ("image/jpeg", "image/png", "image/webp"):
    schemathesis.openapi.media_type(kind, PICTURES)
