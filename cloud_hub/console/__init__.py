"""What operators see: pages that read without JavaScript, an API, and live figures.

    app.py            adds the console to the hub's HTTP door: routes, and who may use which
    access.py         host and origin checks, sessions, sign-in, security headers
    pages.py          overview and sign-in, rendered on the server
    fleet_pages.py    devices
    release_pages.py  models, releases; the deployment form
    report_page.py    the workshop's own page, as it came and powerless
    fleet_api.py      the same for programs
    api.py            the same figures as JSON
    live.py           one WebSocket per tab: at most one value per topic and second
    views.py          what the overview page says, as texts and shapes; pure
    fleet_views.py    what the device pages say; pure
    model_views.py    what the lists of models and releases say; pure
    release_views.py  what the page of a release says; lineage_views.py: of parent and children; pure
    serving_views.py  which variants devices left aside; certificate_views.py: what one promises; pure
    report_views.py   what the workshop's report says; pure
    deploy_views.py   what a deployment will do; pure
    cards.py          model cards from Markdown
    roster.py         which devices a page of the table shows
    charts.py         the geometry of charts; pure
    figures.py        numbers as people read them; pure
    assets.py         scripts and styles under an address that changes with their content

A figure is put into words in one place, the views. The page is rendered from it, and the
same value is pushed to open tabs, whose scripts only write texts and set shapes.
"""
