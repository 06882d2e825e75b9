package overlay

// wantHardened checks every setting of law 11.
func (l *lab) wantHardened(d *tunDevice) {
	l.Helper()
	link, err := d.ownLink(d.view)
	l.must(err)
	for _, h := range hardened {
		is := h.of(&link)
		if is == nil {
			l.Errorf("%s is not there", h.name)
		} else if *is != h.wanted {
			l.Errorf("%s is %d, want %d", h.name, *is, h.wanted)
		}
	}
}
