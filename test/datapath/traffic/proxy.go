package traffic

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
)

// Go makes a connection of package net of the socket, as most Go programs have it,
// in place of the Conn, which is closed. The caller closes it.
func (c *Conn) Go() (*net.TCPConn, error) {
	conn, err := net.FileConn(c.File) // has a duplicate
	if err := errors.Join(err, c.Close()); err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// Join is what a Go L4 proxy does with its two connections: io.Copy both ways,
// which uses splice(2) unless that is refused. It closes them in the end.
func Join(a, b *net.TCPConn) {
	done := make(chan bool, 2)
	for _, way := range [][2]*net.TCPConn{{a, b}, {b, a}} {
		go func() {
			_, _ = io.Copy(way[0], way[1])
			_ = way[0].CloseWrite()
			done <- true
		}()
	}
	<-done
	<-done
	a.Close()
	b.Close()
}

// Relayed sends at one end of something and receives at the other, until the
// connections' deadlines.
func Relayed(from, to net.Conn, content []byte) error {
	sent := make(chan error, 1)
	go func() {
		_, err := from.Write(content)
		sent <- err
	}()
	got := make([]byte, len(content))
	n, err := io.ReadFull(to, got)
	if err != nil {
		return fmt.Errorf("%d of %d bytes: %w", n, len(content), err)
	}
	if !bytes.Equal(got, content) {
		return errors.New("the bytes differ")
	}
	return <-sent
}
