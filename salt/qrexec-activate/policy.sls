# In dom0: a line of policy for each route.
{% from 'qrexec-activate/map.jinja' import config, routes with context %}
{% set folder = config.get('policy_dir', '/etc/qubes/policy.d') %}

{{ folder }}/31-qrexec-activate.policy:
  file.managed:
    - mode: '0664'
    - contents:
      - '# Written by Salt from the pillar qrexec-activate:routes; changes are lost.'
{% for name, route in routes | dictsort if not route.get('absent') %}
      - {{ [route.rpc, '+' ~ route.argument, route.client, route.target, route.get('policy', 'ask')] | join(' ') | tojson }}
{% endfor %}
