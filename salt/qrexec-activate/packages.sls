# In a template or a standalone qube: what the pillar says for it.
{% from 'qrexec-activate/map.jinja' import config with context %}
{% set names = config.get('templates', {}).get(grains['id'], []) %}
{% set sources = config.get('sources', {}) %}

{% if names %}
qrexec-activate packages:
  pkg.installed:
{% if sources %}
    - sources:
{% for name in names %}
      - {{ name }}: {{ sources[name] }}
{% endfor %}
{% else %}
    - pkgs: {{ names | tojson }}
{% endif %}
{% endif %}
