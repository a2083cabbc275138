// Peer is the one program of the image that the runtime tests' containers run.
//
//	peer pause                  waits to be stopped (the pod's sandbox)
//	peer serve PORT             echoes what comes to PORT
//	peer talk HOST:PORT COUNT   sends COUNT messages of 4 KiB, checks the echoes, and
//	                            prints what it saw as JSON; fails if it cannot connect
//	peer http PORT              serves HTTP on PORT until SIGTERM
//	peer load URL FILE          asks URL until FILE exists (which it removes), and prints
//	                            what came of it as JSON
//	peer touch FILE             makes FILE
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const messageSize = 4096 // bytes

// Report is what talk prints.
type Report struct {
	Bytes         int    `json:"bytes"`         // sent, and as many received
	SentByTCP     uint64 `json:"sentByTCP"`     // bytes of them that went by TCP
	ReceivedByTCP uint64 `json:"receivedByTCP"` // bytes that came by TCP
	// Failure is what went wrong once there was a connection: unlike a server that is
	// still starting, nothing to try again.
	Failure string `json:"failure,omitempty"`
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 1 && args[0] == "pause":
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, unix.SIGINT, unix.SIGTERM)
		<-stop
		return nil
	case len(args) == 2 && args[0] == "serve":
		return serve(args[1])
	case len(args) == 3 && args[0] == "talk":
		count, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		r, err := talk(args[1], count)
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(r)
	case len(args) == 2 && args[0] == "http":
		return serveHTTP(args[1])
	case len(args) == 3 && args[0] == "load":
		r, err := load(args[1], args[2])
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(r)
	case len(args) == 2 && args[0] == "touch":
		return os.WriteFile(args[1], nil, 0o600)
	}
	return errors.New("usage: peer pause | serve PORT | talk HOST:PORT COUNT | http PORT | load URL FILE | touch FILE")
}

func serve(port string) error {
	l, err := net.Listen("tcp", net.JoinHostPort("", port))
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go echo(c)
	}
}

// echo copies by read and write: without a splice guard, io.Copy would hang on an
// accelerated connection.
func echo(c net.Conn) {
	defer c.Close()
	b := make([]byte, 64<<10)
	for {
		n, err := c.Read(b)
		if n > 0 {
			if _, err := c.Write(b[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func talk(addr string, count int) (*Report, error) {
	c, err := net.DialTimeout("tcp", addr, 20*time.Second)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	r, err := converse(c.(*net.TCPConn), count)
	if err != nil {
		r = &Report{Failure: err.Error()}
	}
	return r, nil
}

func converse(c *net.TCPConn, count int) (*Report, error) {
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return nil, err
	}
	source := rand.NewChaCha8([32]byte{})
	message, reply := make([]byte, messageSize), make([]byte, messageSize)
	for i := range count {
		source.Read(message)
		if _, err := c.Write(message); err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(c, reply); err != nil {
			return nil, err
		}
		if !bytes.Equal(message, reply) {
			return nil, fmt.Errorf("message %d came back changed", i)
		}
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	r := &Report{Bytes: count * messageSize}
	var infoErr error
	err = raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			infoErr = err
			return
		}
		r.SentByTCP, r.ReceivedByTCP = info.Bytes_sent, info.Bytes_received
	})
	return r, errors.Join(err, infoErr)
}
