package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Names of workers.
const (
	grpcServerName = "grpc-server"
	grpcClientName = "grpc-client"
)

// most is the size of a message that both sides take.
const most = 16 << 20

// grpcService has no generated code: its messages are one of protobuf's own types.
var grpcService = grpc.ServiceDesc{
	ServiceName: "test.Echo",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{
		{MethodName: "Digest", Handler: func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			in := &wrapperspb.BytesValue{}
			if err := decode(in); err != nil {
				return nil, err
			}
			return wrapperspb.Bytes([]byte(digest(in.Value))), nil
		}},
		{MethodName: "Refuse", Handler: func(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			return nil, status.Error(codes.FailedPrecondition, "refused")
		}},
		{MethodName: "Hang", Handler: func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}},
	},
	Streams: []grpc.StreamDesc{
		{StreamName: "Echo", ClientStreams: true, ServerStreams: true, Handler: func(_ any, stream grpc.ServerStream) error {
			for {
				in := &wrapperspb.BytesValue{}
				if err := stream.RecvMsg(in); errors.Is(err, io.EOF) {
					return nil
				} else if err != nil {
					return err
				}
				if err := stream.SendMsg(in); err != nil {
					return err
				}
			}
		}},
	},
}

func grpcServer([]string) int {
	server := grpc.NewServer(grpc.MaxRecvMsgSize(most), grpc.MaxSendMsgSize(most))
	server.RegisterService(&grpcService, nil)
	l, err := net.Listen("tcp", ":9000")
	if err != nil {
		return failed(err)
	}
	return failed(server.Serve(l))
}

func grpcClient(args []string) int {
	conn, err := grpc.NewClient("passthrough:///"+args[0], grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(most), grpc.MaxCallSendMsgSize(most)))
	if err != nil {
		return failed(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for i, size := range []int{0, 1, 1000, 100000, 8 << 20} {
		for range 20 {
			out := &wrapperspb.BytesValue{}
			err := conn.Invoke(ctx, "/test.Echo/Digest", wrapperspb.Bytes(content(size, uint64(i))), out)
			if err != nil {
				return failed(err)
			}
			fmt.Printf("Digest: %s\n", out.Value)
			if size > 1000 {
				break
			}
		}
	}
	err = conn.Invoke(ctx, "/test.Echo/Refuse", wrapperspb.Bytes(nil), &wrapperspb.BytesValue{})
	fmt.Println("Refuse:", err)
	soon, cancelSoon := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancelSoon()
	err = conn.Invoke(soon, "/test.Echo/Hang", wrapperspb.Bytes(nil), &wrapperspb.BytesValue{})
	fmt.Println("Hang:", status.Code(err))

	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() { errs[i] = echo(ctx, conn, uint64(i)) })
	}
	wg.Wait()
	fmt.Println("Echo:", len(errs), "streams")
	return failed(errors.Join(errs...))
}

// echo sends messages of many sizes without waiting for their echoes.
func echo(ctx context.Context, conn *grpc.ClientConn, seed uint64) error {
	stream, err := conn.NewStream(ctx, &grpcService.Streams[0], "/test.Echo/Echo")
	if err != nil {
		return err
	}
	const messages = 200
	size := func(i int) int { return i * i * 3 }
	sent := make(chan error, 1)
	go func() {
		for i := range messages {
			if err := stream.SendMsg(wrapperspb.Bytes(content(size(i), seed+uint64(i)))); err != nil {
				sent <- err
				return
			}
		}
		sent <- stream.CloseSend()
	}()
	for i := range messages {
		got := &wrapperspb.BytesValue{}
		if err := stream.RecvMsg(got); err != nil {
			return fmt.Errorf("message %d: %w", i, err)
		}
		if g, w := digest(got.Value), digest(content(size(i), seed+uint64(i))); g != w {
			return fmt.Errorf("message %d is %s, want %s", i, g, w)
		}
	}
	if err := stream.RecvMsg(&wrapperspb.BytesValue{}); !errors.Is(err, io.EOF) {
		return fmt.Errorf("after the last message: %w, want EOF", err)
	}
	return <-sent
}

func grpcCase(s *scene) (string, error) {
	client, server, err := s.twoPods()
	if err != nil {
		return "", err
	}
	if _, err := server.startWorker(grpcServerName); err != nil {
		return "", err
	}
	if err := server.listens(9000); err != nil {
		return "", err
	}
	return client.work(grpcClientName, server.at(9000))
}
